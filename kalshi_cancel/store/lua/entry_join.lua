-- entry_join: what a further request adds to an entry's state (entry_state.lua); put before accept.lua.
--
-- Expects `prefix`, `asked`, gather.lua and reply.lua.

-- Everybody who asks gets a copy of the record, with the names: more would be too long a record.
local NAMES_MOST, NAMES_MOST_BYTES = 100, 4000

local function is_listed(list, name)  -- the list's text need not be taken apart for most names
  if string.find(name, '[,\\]') then
    for _, known in ipairs(texts(list)) do
      if cjson.encode(known) == name then return true end
    end
    return false
  end
  return string.sub(list, 2, #name + 1) == name or string.find(list, ',' .. name, 1, true)
end

local function add_name(state, name)  -- `name`: its JSON
  local list = state.names or '[]'
  if string.sub(list, 1, 2) ~= '["' or string.sub(list, -2) ~= '"]' then list = '[]' end
  if is_listed(list, name) then return end
  local is_full = state.left_out or #list + #name > NAMES_MOST_BYTES
  if is_full or select(2, string.gsub(list, '","', '')) + 2 > NAMES_MOST then
    state.left_out, state.changed.left_out = (tonumber(state.left_out) or 0) + 1, true
  else
    state.names, state.changed.names = (list == '[]' and '[' or string.sub(list, 1, -2) .. ',') .. name .. ']', true
  end
end

local function add_waiter(state, order_id, task_id)
  if not state.reply_to then
    state.reply_to, state.changed.reply_to = '[' .. cjson.encode(task_id) .. ']', true
    return
  end
  if not state.asked_by then
    state.asked_by, state.further = {}, 0
    for _, known in ipairs(texts(state.reply_to)) do state.asked_by[known] = true end
  end
  local waiters = prefix .. ':waiters:' .. order_id
  if state.asked_by[task_id] or redis.call('ZSCORE', waiters, task_id) then return end
  state.asked_by[task_id], state.further = true, state.further + 1
  gather('ZADD', waiters, redis.call('ZCARD', waiters) + state.further, task_id)  -- by when they came
  state.waiters, state.changed.waiters = '1', true
end

local function join(state, order_id, request, path, requested_by, deadline_ms, task_id)
  state.changed = state.changed or {}
  state.request = state.request or cjson.decode(state.text)
  local more_known = false
  for field, value in pairs(cjson.decode(request)) do
    -- What a listing has seen of the order is worth most when it is new.
    local newer = string.sub(field, 1, 5) == 'seen_' and state.request[field] ~= value
    if state.request[field] == nil or newer then state.request[field] = value; more_known = true end
  end
  if more_known then
    local is_json, text = pcall(cjson.encode, state.request)
    if is_json then state.text, state.changed.request = text, true end
    if state.path == 'write' and not state.claimed then state.path = path end
  end
  if requested_by ~= '' then add_name(state, as_listed(requested_by)) end
  if task_id ~= '' then add_waiter(state, order_id, task_id) end
  if asked.lane == 'risk' then state.lane = 'risk' end
  if state.is_over then  -- given up on its first deadline: asked again, it is tried again
    state.is_over, state.deadline_ms, state.changed.deadline, state.asked_anew = false, deadline_ms, true, true
  elseif deadline_ms > state.deadline_ms then
    state.deadline_ms, state.changed.deadline = deadline_ms, true
  end
end

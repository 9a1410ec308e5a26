-- entry_state: an order's entry as a table: a new one, or what there is of it in the cancel store; put before accept.lua.
--
-- Expects `prefix`, `asked`, gather.lua and aside.lua. What is asked further is joined to it (entry_join.lua), and it is put into the
-- store once (entry_put.lua).

local encoded_names = {}
local function as_listed(requested_by)  -- a name's JSON as lists have it: others write what is not ASCII otherwise
  encoded_names[requested_by] = encoded_names[requested_by] or cjson.encode(cjson.decode(requested_by))
  return encoded_names[requested_by]
end

local function new_state(request, path, requested_by, deadline_ms, task_id)
  return {
    is_new = true, text = request, lane = asked.lane, path = path, deadline_ms = deadline_ms,
    names = requested_by ~= '' and '[' .. as_listed(requested_by) .. ']', reply_to = task_id ~= '' and '[' .. cjson.encode(task_id) .. ']',
  }
end

local function stored_state(key, is_dead)  -- of an entry, or of a dead letter; nil, and what can be read, if it is spoilt
  local e = fields(key, 'request', 'requested_by', 'reply_to', 'lane', 'deadline_ms', 'token', 'reported', 'path', 'left_out', 'waiters') or {}
  local is_json, request = pcall(cjson.decode, e[1])
  local in_line = (e[4] == 'risk' or e[4] == 'strategy') and e[8]
  if not (is_json and type(request) == 'table' and request.order_id and in_line and tonumber(e[5])) then return nil, e end
  local is_over = is_dead or e[7] == '1'  -- nobody waits any more, and the record says so
  return {
    text = e[1], request = request, names = e[2], reply_to = e[3], lane = e[4], deadline_ms = tonumber(e[5]), path = e[8],
    left_out = e[9], waiters = e[10], claimed = not is_dead and (e[6] or '') ~= '', was_dead = is_dead,
    home = not is_dead and prefix .. ':due:' .. e[4] .. ':' .. e[8], lane_was = e[4], path_was = e[8],
    is_over = is_over, record_goes = is_over, changed = {},
  }
end

-- The state; whether a cancel may have been under way that nobody knows of; and what can be read of a spoilt one, which is set aside.
local function meet(order_id)
  local entry, letter = prefix .. ':pending:' .. order_id, prefix .. ':dead:' .. order_id
  local was_aside = redis.call('EXISTS', prefix .. ':aside:' .. order_id) == 1
  local state, spoilt
  if redis.call('EXISTS', entry) == 1 then
    state, spoilt = stored_state(entry, false)
    if spoilt then set_aside(order_id, entry) elseif was_aside then leave_aside(order_id) end
  elseif redis.call('EXISTS', letter) == 1 then
    state, spoilt = stored_state(letter, true)
    if spoilt then set_aside(order_id, letter) end
  elseif was_aside then
    leave_aside(order_id)
  end
  return state, was_aside or spoilt ~= nil, spoilt
end

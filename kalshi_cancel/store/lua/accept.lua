-- accept: enters cancel requests into the cancel store, or joins them to the entries that are there already.
--
-- (after gather.lua, audit.lua, wake_ups.lua, fenced.lua, reply.lua, aside.lua, buckets.lua, grant.lua) asked:
--       record_prefix · lane · life_s (of records) · queue (key of the lane's) · has_audit_log · progress (what is known already about new ones: JSON,
--       or empty) · due_in_ms (of those) · id (of the mass cancel that asks, or empty) · token (of its runner) ·
--       not_believed_ms (from which age on a final record is not believed; absent: always believed);
--       rows: order_id · request (JSON) · path · requested_by (a JSON string, or empty) · deadline from now, ms ·
--       task id that wants the result too (or empty)
-- returns { whether a listening sender was woken (1, 0), messages waiting in the queue where none was,
--           then for each request: the final record's JSON, or "joined" to an open one, or "" when new },
--         or "fenced": the mass cancel has a report, or another runner
--
-- An order has one entry, however many ask: a further request adds its name, its task id for a reply, what
-- routing was not known yet, a later deadline, and the risk lane if it comes from there. An order whose
-- record is final is answered from it; a record that is not final goes, because work on it starts again. So
-- does a final one that is too old to be believed: somebody saw the order rest after that. An entry that cannot
-- be read is set aside, and the order entered anew. A lone new one is claimed in the same step where a worker is idle (grant.lua).

-- Everybody who asks gets a copy of the record, with the names: more would be too long a record.
local NAMES_MOST, NAMES_MOST_BYTES = 100, 4000
-- Whoever waits for longer than this has given up; so the list of an order that never settles has an end.
local WAITERS_LIFE_S = 7 * 86400  -- store/lists.py
local record_prefix, lane, life_s = asked.record_prefix, asked.lane, asked.life_s

if fenced(asked.id, asked.token) then return 'fenced' end

local function outcome_of(record)  -- nil: it is none of ours
  local is_json, known = pcall(cjson.decode, record)
  return is_json and type(known) == 'table' and type(known.result) == 'table' and known.result.outcome
end

local function asked_again(request)
  local known = cjson.decode(request)
  known.again = true
  return cjson.encode(known)
end

local function believed(record_key)
  if not asked.not_believed_ms then return true end
  local left_ms = redis.call('PTTL', record_key)
  return left_ms >= 0 and math.max(life_s * 1000 - left_ms, 0) < asked.not_believed_ms
end

local known_paths = {}
local function stand(order_id, in_lane, path, at_ms)  -- a place in line
  if not known_paths[path] then gather('SADD', prefix .. ':paths', path) end
  known_paths[path] = true
  gather('ZADD', prefix .. ':due:' .. in_lane .. ':' .. path, at_ms, order_id)
end

-- What is known of an order's entry, with what joins it; it is put into the cancel store once, after all have joined.

local encoded_names = {}
local function as_listed(requested_by)  -- a name's JSON as lists have it: others write what is not ASCII otherwise
  encoded_names[requested_by] = encoded_names[requested_by] or cjson.encode(cjson.decode(requested_by))
  return encoded_names[requested_by]
end

local function new_state(request, path, requested_by, deadline_ms, task_id)
  return {
    is_new = true, text = request, lane = lane, path = path, deadline_ms = deadline_ms,
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
  if lane == 'risk' then state.lane = 'risk' end
  if state.is_over then  -- given up on its first deadline: asked again, it is tried again
    state.is_over, state.deadline_ms, state.changed.deadline, state.asked_anew = false, deadline_ms, true, true
  elseif deadline_ms > state.deadline_ms then
    state.deadline_ms, state.changed.deadline = deadline_ms, true
  end
end

local function put_new(order_id, state, claim)  -- `claim`: it is claimed already
  local entry = prefix .. ':pending:' .. order_id
  sure[entry] = true
  write('HSET', entry, 'request', state.text, 'lane', lane, 'path', state.path, 'accepted_ms', now_ms, 'deadline_ms', state.deadline_ms)
  if state.names then gather('HSET', entry, 'requested_by', state.names) end
  if state.left_out then gather('HSET', entry, 'left_out', state.left_out) end
  if state.reply_to then gather('HSET', entry, 'reply_to', state.reply_to) end
  if state.waiters then gather('HSET', entry, 'waiters', 1) end
  if asked.progress ~= '' then gather('HSET', entry, 'progress', asked.progress) end
  if claim then pass_on(claim, order_id, state.text, lane, state.deadline_ms) end
  stand(order_id, lane, state.path, now_ms + (claim and claim.lease_ms or asked.due_in_ms))
  gather('ZADD', prefix .. ':deadline', state.deadline_ms, order_id)
end

local function put_joined(order_id, state)
  local entry, changed = prefix .. ':pending:' .. order_id, state.changed
  local due = state.home and redis.call('ZSCORE', state.home, order_id)
  if state.was_dead then  -- a dead letter is an entry again, with its progress
    gather('ZREM', prefix .. ':dead', order_id)
    write('RENAME', prefix .. ':dead:' .. order_id, entry)
    gather('HSET', entry, 'accepted_ms', now_ms)
  end
  if changed.request then gather('HSET', entry, 'request', state.text) end
  if changed.names then gather('HSET', entry, 'requested_by', state.names) end
  if changed.left_out then gather('HSET', entry, 'left_out', state.left_out) end
  if changed.reply_to then gather('HSET', entry, 'reply_to', state.reply_to) end
  if changed.waiters then gather('HSET', entry, 'waiters', 1) end
  if changed.deadline then
    gather('HSET', entry, 'deadline_ms', state.deadline_ms)
    gather('ZADD', prefix .. ':deadline', state.deadline_ms, order_id)
  end
  if state.asked_anew then
    gather('HSET', entry, 'reported', 0)
    if state.claimed then gather('HSET', entry, 'asked_again', 1) end
  end
  local moves = state.lane ~= state.lane_was or state.path ~= state.path_was
  local due_ms = state.asked_anew and not state.claimed and now_ms or due or now_ms
  if moves then
    if due then gather('ZREM', state.home, order_id) end
    gather('HSET', entry, 'lane', state.lane, 'path', state.path)
  end
  -- (Without a place in line, nobody would ever come for it.)
  if moves or due ~= due_ms then stand(order_id, state.lane, state.path, due_ms) end
end

-- What there is already is looked up at once for all, because it mostly is nothing.
local record_keys, homes = {}, {}
for order_id in rows(6) do
  record_keys[#record_keys + 1] = record_prefix .. order_id
  homes[#homes + 1] = prefix .. ':pending:' .. order_id
  homes[#homes + 1] = prefix .. ':dead:' .. order_id
  homes[#homes + 1] = prefix .. ':aside:' .. order_id
end
local records = #record_keys > 0 and redis.call('MGET', unpack(record_keys))
local any_there = #homes > 0 and redis.call('EXISTS', unpack(homes)) > 0

local function meet(order_id)  -- what there is of an order in the cancel store: its state; or what is known of it otherwise
  if not any_there then return nil, false end
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

local answer, open, noted, number = { 0, 0 }, 0, {}, 0
local states, order_ids = {}, {}  -- by order id, and in which order
for order_id, request, path, requested_by, deadline_in_ms, task_id in rows(6) do
  local deadline_ms = now_ms + deadline_in_ms
  number = number + 1
  local record_key, record = record_keys[number], records[number]
  if asked.has_audit_log then
    local by = requested_by == '' and '}' or ',"requested_by":' .. requested_by .. '}'
    noted[#noted + 1] = string.sub(request, 1, -2) .. by
  end
  local state, in_doubt, spoilt = states[order_id], false, nil
  if not state then state, in_doubt, spoilt = meet(order_id) end
  local outcome = not state and not in_doubt and record and outcome_of(record)
  local final = outcome == 'canceled' or outcome == 'too_late'
  if final and believed(record_key) then
    local text = task_id ~= '' and without_task_id(record)
    if text then reply(record_prefix, life_s, order_id, text, { task_id }) end
    answer[#answer + 1] = record
  else
    if state then
      join(state, order_id, request, path, requested_by, deadline_ms, task_id)
      if state.record_goes then write('DEL', record_key); state.record_goes = false end
    else
      if record then write('DEL', record_key) end
      -- A cancel of ours may have done it already.
      if final or in_doubt then request = asked_again(request) end
      state = new_state(request, path, spoilt and '' or requested_by, deadline_ms, spoilt and '' or task_id)
      if spoilt then
        state.waiters = spoilt[10]
        for _, name in ipairs(texts(spoilt[2] or '[]')) do join(state, order_id, request, path, cjson.encode(name), deadline_ms, '') end
        for _, waiter in ipairs(texts(spoilt[3] or '[]')) do join(state, order_id, request, path, '', deadline_ms, waiter) end
        join(state, order_id, request, path, requested_by, deadline_ms, task_id)
      end
    end
    if not states[order_id] then order_ids[#order_ids + 1] = order_id end
    answer[#answer + 1] = (states[order_id] or not state.is_new) and 'joined' or ''
    states[order_id] = state
    open = open + 1
  end
end
-- What a mass cancel enters goes out in large calls, or is to be read first.
local lone = number == 1 and asked.progress == '' and asked.id == '' and asked.due_in_ms == 0 and states[order_ids[1]]
local claim = lone and lone.is_new and grant(lane, lone.path)
for _, order_id in ipairs(order_ids) do
  local state = states[order_id]
  if state.changed and state.changed.waiters then write('EXPIRE', prefix .. ':waiters:' .. order_id, WAITERS_LIFE_S) end
  if state.is_new then put_new(order_id, state, claim) else put_joined(order_id, state) end
end
flush()
if open > 0 then
  redis.pcall('HINCRBY', prefix .. ':counts', 'accepted:' .. lane, open)
  answer[1] = claim and 1 or wake_up(lane)
  if answer[1] == 0 then answer[2] = length(asked.queue) end
end
if asked.has_audit_log then
  audit('request', '{"at":' .. now_ms .. ',"lane":"' .. lane .. '","orders":[' .. table.concat(noted, ',') .. ']}')
end
return answer

-- entry_put: puts an entry's state (entry_state.lua) into the cancel store, once, after all have joined; put before accept.lua.
--
-- Expects `prefix`, `now_ms`, `asked`, gather.lua and grant.lua.

-- Whoever waits for longer than this has given up; so the list of an order that never settles has an end.
local WAITERS_LIFE_S = 7 * 86400  -- store/lists.py

local known_paths = {}
local function stand(order_id, in_lane, path, at_ms)  -- a place in line
  if not known_paths[path] then gather('SADD', prefix .. ':paths', path) end
  known_paths[path] = true
  gather('ZADD', prefix .. ':due:' .. in_lane .. ':' .. path, at_ms, order_id)
end

local function put_new(order_id, state, claim)  -- `claim`: it is claimed already
  local entry = prefix .. ':pending:' .. order_id
  sure[entry] = true
  write('HSET', entry, 'request', state.text, 'lane', state.lane, 'path', state.path, 'accepted_ms', now_ms, 'deadline_ms', state.deadline_ms)
  if state.names then gather('HSET', entry, 'requested_by', state.names) end
  if state.left_out then gather('HSET', entry, 'left_out', state.left_out) end
  if state.reply_to then gather('HSET', entry, 'reply_to', state.reply_to) end
  if state.waiters then gather('HSET', entry, 'waiters', 1) end
  if asked.progress ~= '' then gather('HSET', entry, 'progress', asked.progress) end
  if claim then pass_on(claim, order_id, state.text, state.lane, state.deadline_ms) end
  stand(order_id, state.lane, state.path, now_ms + (claim and claim.lease_ms or asked.due_in_ms))
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

local function put_entry(order_id, state, claim)
  if state.changed and state.changed.waiters then write('EXPIRE', prefix .. ':waiters:' .. order_id, WAITERS_LIFE_S) end
  if state.is_new then put_new(order_id, state, claim) else put_joined(order_id, state) end
end

-- accept: enters cancel requests into the cancel store, or joins them to the entries that are there already.
--
-- (after gather.lua, audit.lua, wake_ups.lua, fenced.lua, reply.lua, aside.lua, buckets.lua, grant.lua, entry_*.lua) asked:
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

local record_prefix, lane, life_s = asked.record_prefix, asked.lane, asked.life_s

if fenced(asked.id, asked.token) then return 'fenced' end

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
  if not state and any_there then state, in_doubt, spoilt = meet(order_id) end
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
for _, order_id in ipairs(order_ids) do put_entry(order_id, states[order_id], claim) end
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

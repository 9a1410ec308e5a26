-- retry: puts dead letters back into the cancel store, due at once, with its progress.
--
-- (after gather.lua, place.lua, aside.lua) asked: record_prefix · deadline_ms (from now); rows: order_id
-- returns the order ids that were dead, or set aside, and are open now
--
-- The record that says "unresolved" goes: who asks now gets what comes of this.

local answer, opened_now = {}, {}
for order_id in rows(1) do
  local entry, letter = prefix .. ':pending:' .. order_id, prefix .. ':dead:' .. order_id
  local opened = false
  if redis.call('EXISTS', entry) == 0 and not opened_now[order_id] then
    local home = redis.call('ZSCORE', prefix .. ':dead', order_id) and fields(letter, 'lane', 'path', 'request')
    if home and home[3] then
      gather('ZREM', prefix .. ':dead', order_id)
      write('RENAME', letter, entry)
      place(order_id, home[1], home[2])
      opened = true
    elseif is_aside(order_id) then
      leave_aside(order_id)
      gather('HSET', entry, 'request', '{"order_id": ' .. cjson.encode(order_id) .. ', "again": true}',
        'lane', 'strategy', 'path', 'write')
      place(order_id, 'strategy', 'write')
      sure[entry], opened = true, true
    end
  end
  if opened then
    gather('HSET', entry, 'accepted_ms', now_ms, 'deadline_ms', now_ms + asked.deadline_ms, 'reported', 0)
    gather('ZADD', prefix .. ':deadline', now_ms + asked.deadline_ms, order_id)
    write('DEL', asked.record_prefix .. order_id)
    answer[#answer + 1], opened_now[order_id] = order_id, true
  end
end
flush()
return answer

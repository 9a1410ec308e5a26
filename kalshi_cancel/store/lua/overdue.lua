-- overdue: the open entries whose deadline has passed and whose waiters do not know yet.
--
-- (after gather.lua, place.lua) asked: at_most
-- returns { orders of P:replies_left, as many at most; then for each entry: { order_id, progress, accepted_ms } }
--
-- What cannot be known of an entry is empty. One that has no place in line gets one.

local owed = redis.pcall('SRANDMEMBER', prefix .. ':replies_left', asked.at_most)
local answer = { owed.err and {} or owed }
for _, order_id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':deadline', '-inf', now_ms, 'LIMIT', 0, asked.at_most)) do
  local entry = prefix .. ':pending:' .. order_id
  local e = fields(entry, 'progress', 'accepted_ms', 'request', 'lane', 'path')
  if not e then
    answer[#answer + 1] = { order_id, '', '' }
  elseif e[2] or e[3] then
    answer[#answer + 1] = { order_id, e[1] or '', e[2] or '' }
    place(order_id, e[4], e[5])
  else
    gather('ZREM', prefix .. ':deadline', order_id)  -- an index without its entry
  end
end
flush()
return answer

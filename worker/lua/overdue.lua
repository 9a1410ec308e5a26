-- overdue: the open entries whose deadline has passed and whose waiters were not told so yet.
--
-- ARGV  1 prefix · 2 how many at most
-- returns for each entry: { order_id, learned, accepted_ms }

local answer = {}
for _, order_id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':deadline', '-inf', now_ms, 'LIMIT', 0, ARGV[2])) do
  local e = redis.call('HMGET', prefix .. ':entry:' .. order_id, 'learned', 'accepted_ms')
  if e[2] then
    answer[#answer + 1] = { order_id, e[1] or '', e[2] }
  else
    redis.call('ZREM', prefix .. ':deadline', order_id)  -- an index without its entry
  end
end
return answer

-- retry: puts dead letters back into the book, due at once, with what was learned.
--
-- ARGV  1 prefix · 2 deadline from now, ms · then the order ids
-- returns the order ids that were dead and are open now

local answer = {}
for at = 3, #ARGV do
  local order_id = ARGV[at]
  local entry = prefix .. ':entry:' .. order_id
  if redis.call('ZREM', prefix .. ':dead', order_id) == 1 then
    redis.call('RENAME', prefix .. ':dead:' .. order_id, entry)
    redis.call('HSET', entry, 'accepted_ms', now_ms, 'deadline_ms', now_ms + ARGV[2], 'reported', 0)
    local home = redis.call('HMGET', entry, 'lane', 'path')
    redis.call('ZADD', prefix .. ':due:' .. home[1] .. ':' .. home[2], now_ms, order_id)
    redis.call('ZADD', prefix .. ':deadline', now_ms + ARGV[2], order_id)
    answer[#answer + 1] = order_id
  end
end
return answer

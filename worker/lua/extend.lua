-- extend: keeps claimed entries in the hand that holds them.
--
-- ARGV  1 prefix · 2 lease, ms · then two for each entry: order_id · token
-- returns for each entry: 1 the lease runs anew, 0 the claim is no longer this hand's

local lease_ms = tonumber(ARGV[2])
local answer = {}
for at = 3, #ARGV, 2 do
  local held = redis.call('HMGET', prefix .. ':entry:' .. ARGV[at], 'token', 'lane', 'path')
  if held[1] == ARGV[at + 1] then
    redis.call('ZADD', prefix .. ':due:' .. held[2] .. ':' .. held[3], 'XX', now_ms + lease_ms, ARGV[at])
    answer[#answer + 1] = 1
  else
    answer[#answer + 1] = 0
  end
end
return answer

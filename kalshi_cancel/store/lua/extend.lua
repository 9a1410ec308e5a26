-- extend: keeps claims for the sender that holds them.
--
-- (after gather.lua) ARGV  1 prefix · 2 lease, ms · 3 the worker's name · then two for each entry: order_id · token
-- returns for each entry: 1 the lease runs anew, 0 the claim is no longer this sender's

local lease_ms = tonumber(ARGV[2])
local answer = {}
for at = 4, #ARGV, 2 do
  local held = fields(prefix .. ':pending:' .. ARGV[at], 'token', 'lane', 'path', 'claimed_by') or {}
  if held[1] == ARGV[at + 1] and held[2] and held[3] then
    gather('ZADD', prefix .. ':due:' .. held[2] .. ':' .. held[3], now_ms + lease_ms, ARGV[at])
    -- Who took a claim that came with a wake-up (grant.lua), nobody has known before.
    if held[4] ~= ARGV[3] then gather('HSET', prefix .. ':pending:' .. ARGV[at], 'claimed_by', ARGV[3]) end
    answer[#answer + 1] = 1
  else
    answer[#answer + 1] = 0
  end
end
flush()
return answer

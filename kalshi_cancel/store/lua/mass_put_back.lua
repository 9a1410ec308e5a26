-- mass_put_back: puts a mass cancel back that Redis has lost, for the runner that has it.
--
-- (after gather.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · 4 who has it · 5 life of the lease, ms ·
--       6 how many tasks want the report · those · then two for each field of it: its name · its value
-- returns 1 done, 0 it is there: another runner's, or done
--
-- Its orders are noted anew after that (note_orders.lua).

local id, index = ARGV[2], prefix .. ':mass_cancels'
local mass, waiters = prefix .. ':mass:' .. id, tonumber(ARGV[6])
if redis.call('EXISTS', mass) == 1 then return 0 end
sure[mass] = true
for at = 7, 6 + waiters do gather('SADD', mass .. ':waiters', ARGV[at]) end
for at = 7 + waiters, #ARGV, 2 do gather('HSET', mass, ARGV[at], ARGV[at + 1]) end
gather('HSET', mass, 'fence', ARGV[3])
write('SET', mass .. ':lease', ARGV[4], 'PX', ARGV[5])
gather('ZADD', index, now_ms, id)
gather('SADD', index .. ':open', id)
flush()
return 1

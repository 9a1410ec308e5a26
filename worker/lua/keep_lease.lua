-- keep_lease: runs the lease of a mass cancel anew, for the runner that has it, or when nobody has.
--
-- ARGV  1 key of the lease · 2 runner · 3 its life, ms
-- returns 1 kept, 0 another runner has it

local holder = redis.call('GET', ARGV[1])
if holder and holder ~= ARGV[2] then return 0 end
redis.call('SET', ARGV[1], ARGV[2], 'PX', ARGV[3])
return 1

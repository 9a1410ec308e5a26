-- keep_lease: runs the lease of a mass cancel anew, for the runner that has it, or when nobody has.
--
-- ARGV  1 prefix · 2 key of the lease · 3 runner · 4 its life, ms
-- returns 1 kept, 0 another runner has it

local holder = redis.call('GET', ARGV[2])
if holder and holder ~= ARGV[3] then return 0 end
redis.call('SET', ARGV[2], ARGV[3], 'PX', ARGV[4])
return 1

-- mass_keep: runs the lease of a mass cancel anew, or ends it.
--
-- (after gather.lua, fenced.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · 4 who has it · 5 life of the
--       lease, ms; 0 ends it
-- returns 1 done, 0 it is not this runner's any more

local lease = prefix .. ':mass:' .. ARGV[2] .. ':lease'
if fenced(ARGV[2], ARGV[3]) then return 0 end
if ARGV[5] == '0' then write('DEL', lease) else write('SET', lease, ARGV[4], 'PX', ARGV[5]) end
flush()
return 1

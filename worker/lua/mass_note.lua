-- mass_note: notes facts about a mass cancel.
--
-- (after fenced.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · then three for each:
--       "set", "once" (what was noted first stays) or "add" (to a sum) · field · value
-- returns 1 done, 0 it is not this runner's any more

local mass = prefix .. ':mass:' .. ARGV[2]
if fenced(ARGV[2], ARGV[3]) then return 0 end
for at = 4, #ARGV, 3 do
  local how, field, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  if how == 'once' then
    redis.call('HSETNX', mass, field, value)
  elseif how == 'add' then
    redis.call('HINCRBYFLOAT', mass, field, value)
  else
    redis.call('HSET', mass, field, value)
  end
end
return 1

-- mass_note: notes facts about a mass cancel.
--
-- (after gather.lua, fenced.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · then three for each:
--       "set", "once" (what was noted first stays) or "add" (to a sum, which begins anew where it is no number) · field · value
-- returns 1 done, 0 it is not this runner's any more

local mass = prefix .. ':mass:' .. ARGV[2]
if fenced(ARGV[2], ARGV[3]) then return 0 end
for at = 4, #ARGV, 3 do
  local how, field, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  if how == 'once' then
    write('HSETNX', mass, field, value)
  elseif how == 'add' and number(redis.call('HGET', mass, field) or 0) then
    write('HINCRBYFLOAT', mass, field, value)
  else
    write('HSET', mass, field, value)
  end
end
flush()
return 1

-- mass_note: notes facts about a mass cancel.
--
-- (after gather.lua, fenced.lua) asked: id · token; rows: how · field · value. How is "set", "once" (what was noted first
--       stays) or "add" (to a sum, which begins anew where it is no number)
-- returns 1 done, 0 it is not this runner's any more

local mass = prefix .. ':mass:' .. asked.id
if fenced(asked.id, asked.token) then return 0 end
for how, field, value in rows(3) do
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

-- mass_keep: runs the lease of a mass cancel anew, or ends it.
--
-- (after gather.lua, fenced.lua) asked: id · token · name (of who has it) · life_ms (of the lease; 0 ends it)
-- returns 1 done, 0 it is not this runner's any more

local lease = prefix .. ':mass:' .. asked.id .. ':lease'
if fenced(asked.id, asked.token) then return 0 end
if asked.life_ms == 0 then write('DEL', lease) else write('SET', lease, asked.name, 'PX', asked.life_ms) end
flush()
return 1

-- mass_put_back: puts a mass cancel back that Redis has lost, for the runner that has it.
--
-- (after gather.lua) asked: id · token · name (of who has it) · life_ms (of the lease) · waiters (tasks that
--       want the report); rows: field · value
-- returns 1 done, 0 it is there: another runner's, or done
--
-- Its orders are noted anew after that (note_orders.lua).

local id, index = asked.id, prefix .. ':mass_cancels'
local mass = prefix .. ':mass:' .. id
if redis.call('EXISTS', mass) == 1 then return 0 end
sure[mass] = true
for _, task_id in ipairs(asked.waiters) do gather('SADD', mass .. ':waiters', task_id) end
for field, value in rows(2) do gather('HSET', mass, field, value) end
gather('HSET', mass, 'fence', asked.token)
write('SET', mass .. ':lease', asked.name, 'PX', asked.life_ms)
gather('ZADD', index, now_ms, id)
gather('SADD', index .. ':open', id)
flush()
return 1

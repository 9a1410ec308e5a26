-- note_orders: notes orders that a mass cancel is about to have canceled.
--
-- (after gather.lua, fenced.lua) asked: id · token · anew (also those that were noted before);
--       rows: order_id · what it has (JSON)
-- returns 1 done, 0 it is not this runner's any more
--
-- What was noted first stays, because later an order has less, unless it is to be canceled anew. One that is
-- noted again may be left twice: it is struck off twice.

local mass = prefix .. ':mass:' .. asked.id
local orders, left = mass .. ':orders', mass .. ':left'
if fenced(asked.id, asked.token) then return 0 end
for order_id, had in rows(2) do
  gather('RPUSH', left, order_id)
  if asked.anew or not redis.call('HGET', orders, order_id) then gather('HSET', orders, order_id, had) end
end
flush()
return 1

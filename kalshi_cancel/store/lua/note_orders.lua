-- note_orders: notes orders that a mass cancel is about to have canceled.
--
-- (after gather.lua, fenced.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · then three for each order:
--       order_id · what it has (JSON) · 1: also when it was noted before
-- returns 1 done, 0 it is not this runner's any more
--
-- What was noted first stays, because later an order has less, unless it is to be canceled anew. One that is
-- noted again may be left twice: it is struck off twice.

local orders, left = prefix .. ':mass:' .. ARGV[2] .. ':orders', prefix .. ':mass:' .. ARGV[2] .. ':left'
if fenced(ARGV[2], ARGV[3]) then return 0 end
for at = 4, #ARGV, 3 do
  gather('RPUSH', left, ARGV[at])
  local is_to_be_noted = ARGV[at + 2] == '1' or not redis.call('HGET', orders, ARGV[at])
  if is_to_be_noted then gather('HSET', orders, ARGV[at], ARGV[at + 1]) end
end
flush()
return 1

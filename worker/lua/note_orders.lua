-- note_orders: notes orders that a mass cancel is about to have canceled.
--
-- (after gather.lua) ARGV  1 prefix · 2 the mass cancel's id · then two for each order: order_id · what it has (JSON)
--
-- What was noted first stays: later it has less. One that is noted again may be left twice: it is struck off twice.

local mass = prefix .. ':mass:' .. ARGV[2]
for at = 3, #ARGV, 2 do
  redis.call('HSETNX', mass .. ':orders', ARGV[at], ARGV[at + 1])
  gather('RPUSH', mass .. ':left', ARGV[at])
end
flush()

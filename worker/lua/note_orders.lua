-- note_orders: notes orders that a mass cancel is about to have canceled.
--
-- ARGV  1 prefix · 2 the mass cancel's id · then two for each order: order_id · what it has (JSON)
--
-- What was noted first stays: later it has less.

local mass = prefix .. ':mass:' .. ARGV[2]
for at = 3, #ARGV, 2 do
  redis.call('HSETNX', mass .. ':orders', ARGV[at], ARGV[at + 1])
  redis.call('SADD', mass .. ':open', ARGV[at])
end

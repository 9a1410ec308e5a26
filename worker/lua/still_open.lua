-- still_open: strikes settled orders off a mass cancel's list of open ones.
--
-- ARGV  1 prefix · 2 the mass cancel's id · 3 how many to look at, at most
-- returns { how many are open, how many of them the waiters were told are unresolved }
--
-- Its cost shrinks as orders settle; what is left counts as open without another look.

local list = prefix .. ':mass:' .. ARGV[2] .. ':open'
local overdue = 0
for _, order_id in ipairs(redis.call('SRANDMEMBER', list, ARGV[3])) do
  local reported = redis.call('HGET', prefix .. ':entry:' .. order_id, 'reported')
  if not reported then redis.call('SREM', list, order_id) end
  if reported == '1' then overdue = overdue + 1 end
end
return { redis.call('SCARD', list), overdue }

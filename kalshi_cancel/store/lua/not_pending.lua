-- not_pending: which of these orders are not pending.
--
-- ARGV  1 prefix · then order ids
-- returns those ids

local found = {}
for at = 2, #ARGV do
  if redis.call('EXISTS', prefix .. ':pending:' .. ARGV[at]) == 0 then found[#found + 1] = ARGV[at] end
end
return found

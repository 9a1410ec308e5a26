-- without_entry: which of these orders have no entry in the book.
--
-- ARGV  1 prefix · then order ids
-- returns those ids

local found = {}
for at = 2, #ARGV do
  if redis.call('EXISTS', prefix .. ':entry:' .. ARGV[at]) == 0 then found[#found + 1] = ARGV[at] end
end
return found

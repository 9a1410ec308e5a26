-- levels: how some buckets stand at this moment.
--
-- (after gather.lua, buckets.lua) ARGV  1 prefix · then the names of buckets
-- returns for each what `level` tells

local answer = {}
for at = 2, #ARGV do answer[#answer + 1] = level(ARGV[at]) end
return answer

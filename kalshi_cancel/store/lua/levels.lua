-- levels: the tokens in some buckets at this moment.
--
-- (after gather.lua, buckets.lua) ARGV  1 prefix · then the names of buckets
-- returns the tokens of each, as text

local answer = {}
for at = 2, #ARGV do answer[#answer + 1] = string.format('%.3f', bucket_state(ARGV[at]).tokens) end
return answer

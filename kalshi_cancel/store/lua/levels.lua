-- levels: how some buckets stand at this moment.
--
-- (after gather.lua, buckets.lua) asked: buckets
-- returns for each what `level` tells

local answer = {}
for _, name in ipairs(asked.buckets) do answer[#answer + 1] = level(name) end
return answer

-- turn: one step of a hand: puts down what it has done, and takes up what is due next.
--
-- (after audit.lua, bells.lua, gather.lua, tell.lua, conclude.lua, buckets.lua, claim.lua) ARGV  1 prefix of the book's keys ·
--       2 prefix of the record keys · 3 record's life, seconds · 4 what goes into the trail (the body's JSON
--       without its first brace; empty: nothing) · 5 how many values of conclusions follow · those (see
--       conclude.lua) · then, if anything is to be claimed, what claim.lua expects
-- returns { for each conclusion whether it was done (1, 0), then the claim, if there was to be one }

local answer = {}
local first, many = 6, tonumber(ARGV[5])
if many > 0 then
  local lost
  answer[1], lost = conclude(ARGV[2], ARGV[3], first, first + many - 1)
  if ARGV[4] ~= '' then audit('work', '{"at":' .. now_ms .. ',' .. ARGV[4]) end
  if #lost > 0 and ARGV[4] ~= '' then audit('lost', '{"at":' .. now_ms .. ',"orders":' .. cjson.encode(lost) .. '}') end
else
  answer[1] = {}
end
if #ARGV >= first + many then answer[2] = claim(first + many) end
return answer

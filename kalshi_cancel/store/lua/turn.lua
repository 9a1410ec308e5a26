-- turn: one step of senders: stores what they have done, and takes up what is due next.
--
-- (after audit.lua, wake_ups.lua, gather.lua, reply.lua, conclude.lua, buckets.lua, claim.lua) ARGV  1 prefix of the store's keys ·
--       2 prefix of the record keys · 3 record's life, seconds · 4 how many entries of the audit log follow · those
--       (a body's JSON without its first brace) · how many values of conclusions follow · those (see
--       conclude.lua) · then, if anything is to be claimed, what claim.lua expects
-- returns { for each conclusion whether it was done (1, 0), then the claims, if there were to be any; null where
--           nothing could be claimed, and why not }
--
-- What was put down is done, whatever is wrong with what is to be taken up: nobody must put it down again.

local answer = {}
local audit_entries = tonumber(ARGV[4])
local first, many = 6 + audit_entries, tonumber(ARGV[5 + audit_entries])
if many > 0 then
  local lost
  answer[1], lost = conclude(ARGV[2], ARGV[3], first, first + many - 1)
  for at = 5, 4 + audit_entries do audit('work', '{"at":' .. now_ms .. ',' .. ARGV[at]) end
  if #lost > 0 and audit_entries > 0 then audit('lost', '{"at":' .. now_ms .. ',"orders":' .. cjson.encode(lost) .. '}') end
else
  answer[1] = {}
end
if #ARGV >= first + many then
  local claimed, what = pcall(claim, first + many)
  if claimed then
    answer[2] = what
  elseif many == 0 then
    error(what)
  else
    answer[2], answer[3] = false, type(what) == 'table' and what.err or tostring(what)
  end
end
return answer

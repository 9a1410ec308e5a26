-- turn: one step of senders: stores what they have done, and takes up what is due next.
--
-- (after audit.lua, wake_ups.lua, gather.lua, reply.lua, conclude.lua, buckets.lua, lines.lua, steps.lua, claim.lua) asked: record_prefix ·
--       life_s · audit (entries of the audit log: each a body's JSON without its first brace) · claim (what
--       claim.lua expects, if anything is to be claimed); rows: conclusions (see conclude.lua)
-- returns { for each conclusion whether it was done (1, 0), then the claims, if there were to be any; null where
--           nothing could be claimed, and why not }
--
-- What was put down is done, whatever is wrong with what is to be taken up: nobody must put it down again.

local answer = {}
local has_conclusions = rows(1)() ~= nil
if has_conclusions then
  local lost
  answer[1], lost = conclude()
  for _, body in ipairs(asked.audit) do audit('work', '{"at":' .. now_ms .. ',' .. body) end
  if #lost > 0 and #asked.audit > 0 then audit('lost', '{"at":' .. now_ms .. ',"orders":' .. cjson.encode(lost) .. '}') end
else
  answer[1] = {}
end
if asked.claim then
  local claimed, what = pcall(claim, asked.claim)
  if claimed then
    answer[2] = what
  elseif not has_conclusions then
    error(what)
  else
    answer[2], answer[3] = false, type(what) == 'table' and what.err or tostring(what)
  end
end
return answer

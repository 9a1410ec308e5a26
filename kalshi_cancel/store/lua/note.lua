-- note: appends to the audit log what no other script does: steps of mass cancels, operators' actions.
--
-- (after audit.lua) asked: kind · body (a JSON object, which gets "at" put before its fields) ·
--       uncounted (how many entries are missing that could not even be counted)
-- returns 1 it is there, 0 it cannot be

if asked.uncounted > 0 then redis.pcall('HINCRBY', prefix .. ':counts', 'audit_missed', asked.uncounted) end
return audit(asked.kind, '{"at":' .. now_ms .. (asked.body == '{}' and '}' or ',' .. string.sub(asked.body, 2))) and 1 or 0

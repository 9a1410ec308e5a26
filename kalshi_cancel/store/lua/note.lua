-- note: appends to the audit log what no other script does: steps of mass cancels, operators' actions.
--
-- (after audit.lua) ARGV  1 prefix · 2 kind · 3 body: a JSON object, which gets "at" put before its fields ·
--       4 how many entries are missing that could not even be counted
-- returns 1 it is there, 0 it cannot be

if ARGV[4] ~= '0' then redis.pcall('HINCRBY', prefix .. ':counts', 'audit_missed', ARGV[4]) end
return audit(ARGV[2], '{"at":' .. now_ms .. (ARGV[3] == '{}' and '}' or ',' .. string.sub(ARGV[3], 2))) and 1 or 0

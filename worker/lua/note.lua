-- note: appends to the trail what no other script does: steps of mass cancels, operators' actions.
--
-- (after audit.lua) ARGV  1 prefix · 2 kind · 3 body: a JSON object, which gets "at" put before its fields

audit(ARGV[2], '{"at":' .. now_ms .. (ARGV[3] == '{}' and '}' or ',' .. string.sub(ARGV[3], 2)))

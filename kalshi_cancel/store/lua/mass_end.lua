-- mass_end: how a mass cancel has ended, without handing out its report, which may be megabytes.
--
-- ARGV  1 key of the mass cancel
-- returns "flat", "not_flat", "planned" (a dry run), or "" when it has no report

local report = redis.call('HGET', ARGV[1], 'report')
if not report then return '' end
-- Quotation marks inside of its texts are escaped, so these are found as fields only.
if string.find(report, '"dry_run": true', 1, true) then return 'planned' end
return string.find(report, '"flat": true', 1, true) and 'flat' or 'not_flat'

-- enter: accepts a mass cancel; entering the same one again only adds who wants its report.
--
-- (after gather.lua) ARGV  1 prefix of our keys · 2 id of the mass cancel · 3 task id that wants the report (or
--       empty) · 4 when it was asked for, ms · 5 what is asked for (a digest): the same id with anything else is
--       another one
-- returns "new", "known", or "other" when the id is taken; and whether there is a report (1, 0)
--
-- Its request follows, by a command of its own: it may be megabytes. Until it is there, nobody takes the mass cancel.

local id = ARGV[2]
local key, index = prefix .. ':mass:' .. id, prefix .. ':mass_cancels'
local meant, report = redis.call('HGET', key, 'meant'), redis.call('HGET', key, 'report')
sure[key] = true
if meant and meant ~= ARGV[5] then return { 'other' } end
if not meant then
  write('HSETNX', key, 'meant', ARGV[5])  -- (HSET could write a report, which a producer may not)
  write('HSETNX', key, 'entered_ms', now_ms)
end
if not report then
  if ARGV[3] ~= '' then gather('SADD', key .. ':waiters', ARGV[3]) end
  if not redis.call('ZSCORE', index, id) then gather('ZADD', index, ARGV[4], id) end
  gather('SADD', index .. ':open', id)
end
flush()
return { meant and 'known' or 'new', report and 1 or 0 }

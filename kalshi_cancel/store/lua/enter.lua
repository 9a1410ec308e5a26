-- enter: accepts a mass cancel; entering the same one again only adds who wants its report.
--
-- (after gather.lua) asked: id (of the mass cancel) · reply_to (the task id that wants the report, or empty) ·
--       asked_at_ms · meant (a digest of what is asked for: the same id with anything else is another one)
-- returns "new", "known", or "other" when the id is taken; and whether there is a report (1, 0)
--
-- Its request follows, by a command of its own: it may be megabytes. Until it is there, nobody takes the mass cancel.

local id = asked.id
local key, index = prefix .. ':mass:' .. id, prefix .. ':mass_cancels'
local meant, report = redis.call('HGET', key, 'meant'), redis.call('HGET', key, 'report')
sure[key] = true
if meant and meant ~= asked.meant then return { 'other' } end
if not meant then
  write('HSETNX', key, 'meant', asked.meant)  -- (HSET could write a report, which a producer may not)
  write('HSETNX', key, 'entered_ms', now_ms)
end
if not report then
  if asked.reply_to ~= '' then gather('SADD', key .. ':waiters', asked.reply_to) end
  if not redis.call('ZSCORE', index, id) then gather('ZADD', index, asked.asked_at_ms, id) end
  gather('SADD', index .. ':open', id)
end
flush()
return { meant and 'known' or 'new', report and 1 or 0 }

-- enter: accepts a mass cancel; entering the same one again only adds who wants its report.
--
-- ARGV  1 prefix of our keys · 2 id of the mass cancel · 3 request (JSON) · 4 task id that wants the report (or empty)
--       5 when it was asked for, ms · 6 what is asked for (JSON): the same id with anything else is another one
-- returns "new", "known", or "other" when the id is taken; and the report (JSON) where there is one

local id = ARGV[2]
local key = prefix .. ':mass:' .. id
local is_new = redis.call('HSETNX', key, 'request', ARGV[3]) == 1
if is_new then redis.call('HSETNX', key, 'meant', ARGV[6]) end
local meant, report = redis.call('HGET', key, 'meant'), redis.call('HGET', key, 'report')
if meant and meant ~= ARGV[6] then return { 'other' } end
if not report then
  if ARGV[4] ~= '' then redis.call('SADD', key .. ':waiters', ARGV[4]) end
  redis.call('ZADD', prefix .. ':masses', 'NX', ARGV[5], id)
  redis.call('SADD', prefix .. ':masses:open', id)
end
return { is_new and 'new' or 'known', report or '' }

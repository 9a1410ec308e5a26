-- enter: accepts a mass cancel; entering the same one again only adds who wants its report.
--
-- (after gather.lua) ARGV  1 prefix of our keys · 2 id of the mass cancel · 3 request (JSON) · 4 task id that wants
--       the report (or empty) · 5 when it was asked for, ms · 6 what is asked for (JSON): the same id with anything
--       else is another one
-- returns "new", "known", or "other" when the id is taken; and the report (JSON) where there is one

local id = ARGV[2]
local key, masses = prefix .. ':mass:' .. id, prefix .. ':masses'
local request, meant, report = redis.call('HGET', key, 'request'), redis.call('HGET', key, 'meant'), redis.call('HGET', key, 'report')
sure[key] = true
if request and meant and meant ~= ARGV[6] then return { 'other' } end
if not request then
  write('HSETNX', key, 'request', ARGV[3])  -- (HSET could write a report, which a producer may not)
  write('HSETNX', key, 'meant', ARGV[6])
end
if not report then
  if ARGV[4] ~= '' then gather('SADD', key .. ':waiters', ARGV[4]) end
  if not redis.call('ZSCORE', masses, id) then gather('ZADD', masses, ARGV[5], id) end
  gather('SADD', masses .. ':open', id)
end
flush()
return { request and 'known' or 'new', report or '' }

-- enter: accepts a mass cancel; entering one again changes nothing.
--
-- ARGV  1 prefix of our keys · 2 id of the mass cancel · 3 request (JSON) · 4 task id that wants the report (or empty)
--       5 when it was asked for, ms
-- returns 1, or 0 when it was there already

local id = ARGV[2]
local key = prefix .. ':mass:' .. id
local is_new = redis.call('HSETNX', key, 'request', ARGV[3])
redis.call('HSETNX', key, 'reply_to', ARGV[4])
redis.call('ZADD', prefix .. ':masses', 'NX', ARGV[5], id)
redis.call('SADD', prefix .. ':masses:open', id)
return is_new

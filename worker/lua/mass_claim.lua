-- mass_claim: takes a mass cancel that nobody is at.
--
-- (after gather.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 who takes it, for people to read · 4 life of the lease, ms
-- returns { fencing token, request (JSON), what it means (JSON), tokens spent, tasks that want the report }; empty: another runner has it, or there is nothing (left) to do

local open, mass = prefix .. ':masses:open', prefix .. ':mass:' .. ARGV[2]
local known = redis.call('HMGET', mass, 'request', 'report', 'fence', 'meant', 'spent')
sure[mass] = true
if not known[1] or known[2] then
  gather('SREM', open, ARGV[2])
  flush()
  return {}
end
if redis.call('EXISTS', mass .. ':lease') == 1 then return {} end
local waiters = members(mass .. ':waiters')
-- Greater than every one before, even if Redis has lost this mass cancel and got it back.
local token = string.format('%.0f', math.max(now_ms, (tonumber(known[3] or 0) or 0) + 1))
write('SET', mass .. ':lease', ARGV[3], 'PX', ARGV[4])
write('HSET', mass, 'fence', token)
flush()
return { token, known[1], known[4] or '', known[5] or '0', waiters }

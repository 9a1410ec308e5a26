-- mass_claim: takes a mass cancel that nobody is at.
--
-- (after gather.lua) asked: id · name (of who takes it, for people to read) · life_ms (of the lease)
-- returns { fencing token, what it means, tokens spent, tasks that want the report }; empty: another runner has it, or there is nothing (left) to do

local ON_ITS_WAY_MS = 60000  -- a request follows its mass cancel
local open, mass = prefix .. ':mass_cancels:open', prefix .. ':mass:' .. asked.id
if redis.call('PTTL', mass .. ':lease') > 0 then return {} end  -- (what has no end there is no lease)
local known = redis.call('HMGET', mass, 'entered_ms', 'report', 'fence', 'meant', 'spent')
sure[mass] = true
local is_there = redis.call('HEXISTS', mass, 'request') == 1
if not is_there and not known[2] and now_ms - (number(known[1]) or 0) < ON_ITS_WAY_MS then return {} end
if not is_there or known[2] then
  if not is_there and known[4] then  -- who asked for it has vanished
    for _, part in ipairs({ '', ':waiters' }) do write('EXPIRE', mass .. part, ON_ITS_WAY_MS / 1000) end
  end
  gather('SREM', open, asked.id)
  flush()
  return {}
end
local waiters = members(mass .. ':waiters')
-- Greater than every one before, even if Redis has lost this mass cancel and got it back.
local token = string.format('%.0f', math.max(now_ms, (number(known[3]) or 0) + 1))
local function begin_anew(key, found)  -- where something of another kind is
  if type(found) == 'table' and found.err then write('DEL', key) end
end
begin_anew(mass .. ':orders', redis.pcall('HGET', mass .. ':orders', ''))
begin_anew(mass .. ':left', redis.pcall('LLEN', mass .. ':left'))
write('SET', mass .. ':lease', asked.name, 'PX', asked.life_ms)
write('HSET', mass, 'fence', token)
flush()
return { token, known[4] or '', known[5] or '0', waiters }  -- (without the request, which may be megabytes)

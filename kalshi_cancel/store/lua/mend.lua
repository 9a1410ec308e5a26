-- mend: has what every cancel needs begin anew where something else is in its place, and gives pending cancels
-- their places in line and among the deadlines that have none.
--
-- (after gather.lua, wake_ups.lua, place.lua) rows: order_id
-- returns { how many had no place in line, those keys in whose place something else was }
--
-- An index holds nothing that its entries do not say, so another look at them brings it back.

local MOST_TOKEN = 2 ^ 52  -- as claim.lua has it
local anew = {}

local function is_another(found)  -- whether a look has met something of another kind
  if type(found) ~= 'table' or not found.err then return false end
  if not string.find(found.err, 'WRONGTYPE', 1, true) then error(found) end
  return true
end

local function begin_anew(key, look, ...)
  if is_another(redis.pcall(look, key, ...)) then
    write('DEL', key)
    sure[key] = true
    anew[#anew + 1] = key
  end
end

for name, look in pairs({ paths = 'SCARD', deadline = 'ZSCORE', claimed_ms = 'HGET', limits = 'HGET' }) do
  if look == 'SCARD' then begin_anew(prefix .. ':' .. name, look) else begin_anew(prefix .. ':' .. name, look, '') end
end
flush()
for _, path in ipairs(redis.call('SMEMBERS', prefix .. ':paths')) do
  for _, lane in ipairs({ 'risk', 'strategy' }) do begin_anew(prefix .. ':due:' .. lane .. ':' .. path, 'ZSCORE', '') end
end
local fence = prefix .. ':fence'
local last = redis.pcall('GET', fence)
last = not is_another(last) and number(last or 0)
if not last or last % 1 ~= 0 or math.abs(last) > MOST_TOKEN then
  write('SET', fence, string.format('%.0f', now_us))  -- more than were ever given
  anew[#anew + 1] = fence
end
flush()

local mended, lanes = 0, {}
for order_id in rows(1) do
  local e = fields(prefix .. ':pending:' .. order_id, 'request', 'lane', 'path', 'deadline_ms', 'reported')
  if e and e[1] then
    if place(order_id, e[2], e[3]) then
      mended = mended + 1
      lanes[e[2] == 'strategy' and 'strategy' or 'risk'] = true
    end
    if e[5] ~= '1' and number(e[4]) and not redis.call('ZSCORE', prefix .. ':deadline', order_id) then
      gather('ZADD', prefix .. ':deadline', e[4], order_id)
    end
  end
end
flush()
for lane in pairs(lanes) do wake_up(lane) end
return { mended, anew }

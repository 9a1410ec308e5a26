-- fenced: whether a mass cancel's runner may not enter orders any more; put before the scripts that do so for it.
--
-- Expects `prefix` and gather.lua. P:mass:{id} has the field `fence`, the token of the latest runner, and `report` once it is done.

local function fenced(mass_id, token)
  if mass_id == '' then return false end
  local key = prefix .. ':mass:' .. mass_id
  local mass = redis.call('HMGET', key, 'fence', 'report')
  sure[key] = true
  return mass[1] ~= token or mass[2] ~= false
end

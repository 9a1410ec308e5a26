-- fenced: whether a mass cancel's runner may not enter orders any more; put before the scripts that do so for it.
--
-- Expects `prefix`. P:mass:{id} has the field `fence`, the token of the latest runner, and `report` once it is done.

local function fenced(mass_id, token)
  if mass_id == '' then return false end
  local mass = redis.call('HMGET', prefix .. ':mass:' .. mass_id, 'fence', 'report')
  return mass[1] ~= token or mass[2] ~= false
end

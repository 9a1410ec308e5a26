-- gather: many members for one command; put before the scripts that change many entries in one step.
--
-- A command in a script costs more than a member in it, here and in the append-only file. What was gathered
-- is done by the next `flush`, which must come before anything reads those keys.

local GATHERED_MOST = 1000  -- values in one command: Lua cannot hand over many more
local gathered = {}

local function flush()
  for command, keys in pairs(gathered) do
    for key, values in pairs(keys) do
      for from = 1, #values, GATHERED_MOST do
        redis.call(command, key, unpack(values, from, math.min(from + GATHERED_MOST - 1, #values)))
      end
    end
  end
  gathered = {}
end

local function gather(command, key, ...)  -- one member, and its score before it where the command wants one
  local keys = gathered[command] or {}
  gathered[command] = keys
  local values = keys[key] or {}
  keys[key] = values
  for _, value in ipairs({ ... }) do values[#values + 1] = value end
end

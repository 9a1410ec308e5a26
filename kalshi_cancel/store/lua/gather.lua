-- gather: gathers what a script is to write, and writes all of it or nothing; put before the scripts that write.
--
-- Redis does not undo a script that fails halfway. So nothing is written before `flush`, and flush writes
-- nothing until it knows that every command will work: the user may run it on that key, and what is there is
-- of the kind that the command takes. What else can stop a script (no memory, a replica, a full disk) stops it
-- at its first write, or not at all. Whatever a script reads before that, it reads as it was before.
--
-- docs/reference/redis-keys.md lists every key with its fields, and what each script writes in which order.
--
-- Many members in one command cost less than many commands, here and in the append-only file.

local GATHERED_MOST = 1000  -- values in one command: Lua cannot hand over many more
-- For each command that wants a key of one kind: a look that fails where the key is of another.
local PROBES = {
  HSET = 'HGET', HDEL = 'HGET', HSETNX = 'HGET', HINCRBY = 'HGET', HINCRBYFLOAT = 'HGET',
  ZADD = 'ZSCORE', ZREM = 'ZSCORE', ZREMRANGEBYSCORE = 'ZSCORE', ZREMRANGEBYRANK = 'ZSCORE',
  SADD = 'SCARD', SREM = 'SCARD',
  LPUSH = 'LLEN', RPUSH = 'LLEN', LTRIM = 'LLEN', LREM = 'LLEN',
  XTRIM = 'XLEN',
}
local TAKES_A_MEMBER = { HGET = true, ZSCORE = true }
local writes, latest = {}, {}  -- in order; the latest of each key
local deleted = { 'DEL' }  -- after these, all at once
local afterwards = {}  -- commands that decide nothing: done last, whatever becomes of each
local sure = {}  -- keys whose kind is known: the script has read them, or they are not there

local function write(command, key, ...)  -- one command, after all that was gathered before it
  local one = { command, key, ... }
  writes[#writes + 1] = one
  latest[key] = one
  if command == 'RENAME' then latest[one[3]], sure[one[3]], sure[key] = one, true, true end
end

local function gather(command, key, ...)  -- more values for the command that came last for this key, if it is the same
  local one, many = latest[key], select('#', ...)
  if not one or one[1] ~= command then
    write(command, key, ...)
  elseif many == 1 then  -- (a list of one or two made for every order costs more than all the rest of this)
    one[#one + 1] = ...
  elseif many == 2 then
    local at = #one
    one[at + 1], one[at + 2] = ...
  else
    for _, value in ipairs({ ... }) do one[#one + 1] = value end
  end
end

local function delete(key) deleted[#deleted + 1] = key end  -- one that nothing else is written to

local function number(text)  -- a finite one; nil: what is stored is none
  local found = tonumber(text or '')
  return found and found == found and math.abs(found) < math.huge and found or nil
end

local may_on_any_key = {}  -- by command
local function may(one)  -- asked without the values, which may be megabytes
  local command, key = one[1], one[2]
  if may_on_any_key[command] == nil then  -- two names that only a pattern for every key has in common
    may_on_any_key[command] = redis.acl_check_cmd(command, '', '', '') and redis.acl_check_cmd(command, '\0', '\0', '\0')
  end
  if may_on_any_key[command] then return true end
  if command == 'DEL' then return redis.acl_check_cmd(unpack(one)) end
  if one[4] then return redis.acl_check_cmd(command, key, '', '') end
  if one[3] then return redis.acl_check_cmd(command, key, command == 'RENAME' and one[3] or '') end
  return redis.acl_check_cmd(command, key)
end

local function check()
  for _, one in ipairs(writes) do
    local command, key = one[1], one[2]
    if not may(one) then
      error({ err = "NOPERM User has no permissions to run the '" .. string.lower(command) .. "' command, or none on its key" })
    end
    local probe = PROBES[command]
    if probe and not sure[key] then
      if TAKES_A_MEMBER[probe] then redis.call(probe, key, '') else redis.call(probe, key) end
      sure[key] = true
    end
  end
end

local function flush()
  if #deleted > 1 and may(deleted) then
    writes[#writes + 1] = deleted
  else  -- one by one they may be allowed, each by another selector of the user's
    for at = 2, #deleted do write('DEL', deleted[at]) end
  end
  check()
  for _, one in ipairs(writes) do
    if #one - 2 <= GATHERED_MOST then
      redis.call(unpack(one))
      has_written = true
    else
      for from = 3, #one, GATHERED_MOST do
        redis.call(one[1], one[2], unpack(one, from, math.min(from + GATHERED_MOST - 1, #one)))
        has_written = true
      end
    end
  end
  for _, one in ipairs(afterwards) do redis.pcall(unpack(one)) end
  writes, latest, afterwards, deleted = {}, {}, {}, { 'DEL' }
end

local function fields(key, ...)  -- values of a hash; nil: what is there is something else
  local found = redis.pcall('HMGET', key, ...)
  if found.err then
    if string.find(found.err, 'WRONGTYPE', 1, true) then return nil end
    error(found)
  end
  sure[key] = true
  return found
end

local function members(key)  -- of a set; none: what is there is something else
  local found = redis.pcall('SMEMBERS', key)
  if found.err and not string.find(found.err, 'WRONGTYPE', 1, true) then error(found) end
  return found.err and {} or found
end

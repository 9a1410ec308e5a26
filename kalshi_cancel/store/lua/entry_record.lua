-- entry_record: what a stored record says about a further request for its order; put before accept.lua.
--
-- Expects `asked`.

local function outcome_of(record)  -- nil: it is none of ours
  local is_json, known = pcall(cjson.decode, record)
  return is_json and type(known) == 'table' and type(known.result) == 'table' and known.result.outcome
end

local function asked_again(request)
  local known = cjson.decode(request)
  known.again = true
  return cjson.encode(known)
end

local function believed(record_key)
  if not asked.not_believed_ms then return true end
  local left_ms = redis.call('PTTL', record_key)
  return left_ms >= 0 and math.max(asked.life_s * 1000 - left_ms, 0) < asked.not_believed_ms
end

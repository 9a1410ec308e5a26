-- lists_complete: which lists have all their results by now.
--
-- (after gather.lua) ARGV  1 prefix · then the tasks' ids, of P:lists
-- returns those whose orders all have one; the others go from P:lists until something is struck off them again

local answer = {}
for at = 2, #ARGV do
  local list = prefix .. ':list:' .. ARGV[at]
  if redis.call('EXISTS', list) == 1 and redis.call('EXISTS', list .. ':left') == 0 then
    answer[#answer + 1] = ARGV[at]
  else
    gather('SREM', prefix .. ':lists', ARGV[at])
  end
end
flush()
return answer

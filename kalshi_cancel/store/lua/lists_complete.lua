-- lists_complete: which lists have all their results by now.
--
-- (after gather.lua) rows: task id (of P:lists)
-- returns those whose orders all have one; the others go from P:lists until something is struck off them again

local answer = {}
for task_id in rows(1) do
  local list = prefix .. ':list:' .. task_id
  if redis.call('EXISTS', list) == 1 and redis.call('EXISTS', list .. ':left') == 0 then
    answer[#answer + 1] = task_id
  else
    gather('SREM', prefix .. ':lists', task_id)
  end
end
flush()
return answer

drop index journal_begun;
drop table task_asks;

drop table run_grades;

-- A legacy database to try the road out of duplicates on: 10,000 employees of 9 departments, 500 of
-- them entered again, three of the departments entered twice, and tickets that refer to employees.

CREATE TABLE department (id serial PRIMARY KEY, name varchar(50) NOT NULL);
CREATE TABLE employee (
    id serial PRIMARY KEY,
    name varchar(100) NOT NULL,
    department_id integer NOT NULL REFERENCES department ON DELETE CASCADE,
    title varchar(60),
    phone text,
    hired_on date
);
-- The models know nothing of this table.
CREATE TABLE ticket (
    id serial PRIMARY KEY,
    employee_id integer NOT NULL REFERENCES employee ON DELETE CASCADE,
    subject text NOT NULL
);

INSERT INTO department (name)
VALUES ('Customer Service'), ('Development'), ('Finance'), ('Human Resources'), ('Marketing'),
       ('Production'), ('Quality Management'), ('Research'), ('Sales'),
       ('Development '), ('Research'), ('Human  Resources');

-- A hundred first names by a hundred family names, each person in one department.
INSERT INTO employee (name, department_id, title, hired_on)
SELECT (string_to_array('Ada Alan Alma Amit Anna Aron Bela Bert Bibi Boris Cara Carl Cleo Cyril Dana '
        'Dario Dina Dora Edna Egon Elias Ella Emil Enno Erik Esra Eva Ezra Fabio Fay Finn Fritz Gita '
        'Glen Greta Hana Hans Heidi Hugo Ida Igor Ilse Ines Ivo Jana Jens Jim Jodi Jorge Judy Kai Karl '
        'Kate Kim Klara Lars Lea Leo Lila Lou Luca Mae Marc Mia Milo Mina Nadia Nils Nora Olaf Olga '
        'Oscar Otto Paul Petra Pia Quinn Ralf Rita Rosa Rudi Sam Sara Sina Sven Tara Tess Theo Tina '
        'Tom Udo Ulla Una Uwe Vera Vito Walt Yara Yves Zoe', ' '))[1 + n % 100]
       || ' ' || (ARRAY['Abel', 'Berg', 'Cole', 'Diaz', 'Eder', 'Funk', 'Gray', 'Hahn', 'Imai', 'Jung'])[1 + n / 100 % 10]
       || (ARRAY['', 'er', 'mann', 'son', 'ini', 'ov', 'ska', 'stad', 'wood', 'worth'])[1 + n / 1000],
       1 + n * 7 % 9, (ARRAY['Engineer', 'Clerk', 'Manager'])[1 + n % 3],
       date '2000-01-01' + n % 7000
  FROM generate_series(0, 9999) AS n;

-- Every twentieth was entered again: as they were, with blanks, with a phone, with other white space,
-- and five of them with another title.
INSERT INTO employee (name, department_id, title, phone, hired_on)
SELECT CASE n / 20 % 4 WHEN 2 THEN replace(name, ' ', '  ') WHEN 3 THEN name || ' ' ELSE name END,
       CASE department_id WHEN 2 THEN 10 WHEN 8 THEN 11 WHEN 4 THEN 12 ELSE department_id END,
       CASE WHEN n % 2000 = 1000 THEN 'Director' WHEN n / 20 % 4 <> 1 THEN title END,
       CASE WHEN n / 20 % 4 = 1 THEN '555-' || n END, hired_on
  FROM (SELECT *, id - 1 AS n FROM employee) AS e WHERE n % 20 = 0 ORDER BY id;

INSERT INTO ticket (employee_id, subject)
SELECT id, 'Ticket ' || id FROM employee WHERE id % 3 = 0;

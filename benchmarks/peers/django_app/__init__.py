"""Django and Django REST framework, as their documentation advises for a JSON API in production."""
